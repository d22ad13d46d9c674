"""Evidence on real data: ``python -m longtail experiment digits|tokens|cifar``; needs the extra ``experiments``."""
