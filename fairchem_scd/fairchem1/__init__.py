"""All that knows fairchem-core 1.10: its config, models, trainers, data and checkpoints."""
