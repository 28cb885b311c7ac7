"""What tests share, by what it is for. It needs fairchem 1.x; tests/denoising does without."""
