"""Code shared by tasks: where data comes from, its cache, the tokenizer, the order of a job."""
