"""Uploads to the Hugging Face Hub, and the model card; loaded when used."""
