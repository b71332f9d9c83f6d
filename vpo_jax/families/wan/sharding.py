"""How Wan's transformer is sharded, as data."""

from jax.sharding import PartitionSpec

from vpo_jax.runtime.mesh import Rules, Trailing

# The first of two products that follow each other is sharded by its outputs over tensor, the second by its inputs, so
# that the tokens between them stay where they are (arXiv 1909.08053). fsdp has the other side. Blocks are stacked,
# and the axis that counts them is never sharded: a block's weights are gathered when its turn comes.
WAN_PARAMETER_RULES: Rules = (
    (r"lora_[AB]$", PartitionSpec()),
    (r"patch_embedding/kernel$", Trailing(None, "fsdp")),  # few inputs
    (r"(^|/)proj_out/kernel$", Trailing("fsdp", None)),  # few outputs
    (r"(to_out\.0|net\.2|linear_2)/kernel$", Trailing("tensor", "fsdp")),
    (r"(kernel|embedding)$", Trailing("fsdp", "tensor")),
)
