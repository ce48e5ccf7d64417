"""What the model files at the top of the plugin are built from: kernels, sharding, masks, loss, KV cache."""
