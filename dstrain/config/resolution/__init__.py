"""Resolution: arguments, the user's config and facts become one complete DeepSpeed config."""
