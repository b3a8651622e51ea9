"""Models from Hugging Face: search, download, convert, list, delete; all talk to the hub is huggingface_hub's."""
