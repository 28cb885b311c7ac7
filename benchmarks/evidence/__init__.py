"""The studies behind docs/evidence.md: what they train on, how they train and judge, their tables and figures."""
