"""Series of LLM checkpoints on this disk that are no Hugging Face folders: nanoGPT's, Lightning's, torchtitan's."""
