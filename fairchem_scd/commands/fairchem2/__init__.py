"""What the commands do where fairchem 2.x is installed."""
