"""What tasks share: where data comes from, its cache, the tokenizer, the order of a job."""
