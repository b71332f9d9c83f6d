"""The commands that trained and measured the shipped models.

A recipe.json records the commands as they were typed. Older ones say `vpo_jax.shapes.NAME`, which is
`vpo_jax.recipes.NAME` now.
"""
