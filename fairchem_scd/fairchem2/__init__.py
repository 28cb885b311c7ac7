"""All that knows fairchem-core 2.x: its unit, models, data and checkpoints."""
