"""What there is to measure, by the names of the command line."""

from . import (
    bench_dora_linear,
    bench_expert_lora_linear,
    bench_gated_prompt_attention,
    bench_lora_linear,
    bench_lora_mlp,
    bench_lora_projections,
    bench_mixed_lora_linear,
    bench_prefix_attention,
    bench_prompt_embedding,
)

BENCHES = {
    "lora": bench_lora_linear.BENCH,
    "prefix": bench_prefix_attention.BENCH,
    "adapter": bench_gated_prompt_attention.BENCH,
    "prompt": bench_prompt_embedding.BENCH,
    "mixed": bench_mixed_lora_linear.BENCH,
    "projections": bench_lora_projections.BENCH,
    "mlp": bench_lora_mlp.BENCH,
    "experts": bench_expert_lora_linear.BENCH,
    "dora": bench_dora_linear.BENCH,
}
BY_OP = {bench.op: bench for bench in BENCHES.values()}
STEP = "step"  # whole training steps, which are no op: see bench_step
