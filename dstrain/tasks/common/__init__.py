"""Code shared by tasks: sources of data, its cache, the tokenizer, the order of a job."""
