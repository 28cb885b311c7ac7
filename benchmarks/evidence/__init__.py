"""The studies behind docs/evidence.md and docs/condition.md: data, training, judging, tables and figures."""
