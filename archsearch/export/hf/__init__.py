"""An exported model as a Hugging Face folder: code for transformers, weights, tokenizer, model card."""
