"""Adapters to training frameworks, imported by name: ``longtail.integrations.transformers`` and ``.lightning``.

What they need is in the extras ``longtail[transformers]`` and ``longtail[lightning]``.
"""
