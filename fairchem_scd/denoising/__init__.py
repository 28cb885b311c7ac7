"""The denoising methods in plain torch: nothing here imports fairchem or torch_geometric."""
