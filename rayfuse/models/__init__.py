"""What an LLM is: its tokenizer, its files, its forward pass, its batches."""
