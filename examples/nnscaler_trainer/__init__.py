"""A language model whose sequence nnScaler shards, trained by nnScaler's own Trainer."""
