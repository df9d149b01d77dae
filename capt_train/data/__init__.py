"""Choose few-shot images, embed them and cache the embeddings."""
