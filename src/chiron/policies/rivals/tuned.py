"""Values found by ``python bench/tune_rivals.py``, which writes this file; do not edit it by hand."""

LLUMNIX_SCALE_UP_BLOCKS: float = 1000.0
LLUMNIX_SCALE_DOWN_BLOCKS: float = 2000.0
LLUMNIX_MAX_NUM_SEQS: int = 512
HPA_QUEUE_TARGET: float = 0.1
HPA_QUEUE_MAX_NUM_SEQS: int = 256
HPA_KV_TARGET: float = 0.02
HPA_KV_MAX_NUM_SEQS: int = 256
CHIRON_PAPER_THETA: float = 0.6
