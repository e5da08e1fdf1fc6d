"""Resolution: one complete DeepSpeed config from arguments, the user's config and facts."""
