"""Evidence on real data, the demo, and what the commands share; ``python -m longtail experiment|demo`` need extras."""
