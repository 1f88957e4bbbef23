"""The recipe that `rayfuse init` prints. What stands behind a `#` there is its default."""

STARTER = """\
# A recipe of rayfuse: change the five places marked <--, then
#   rayfuse plan my.yaml       what it takes and costs; nothing is started
#   rayfuse doctor my.yaml     whether the cluster can run it
#   rayfuse run my.yaml        all stages; give it again after any stop, it goes on where it was
# One setting for one run: `rayfuse run my.yaml train.lambda=0.9`. Settings that are commented out
# have their defaults; recipes/schema.json of the repository tells all of them.

storage: s3://my-bucket/my-run  # <-- a prefix, or a folder that every machine sees
# seed: 0

corpus:
  documents: s3://my-bucket/text/*.parquet  # <-- also .jsonl, .txt, .gz, .zst, several as a list
  max_tokens: 2048  # of a row, by every tokenizer's count; no model here may take fewer
  # shard_tokens: 1000000

target:  # it learns
  model: meta-llama/Llama-2-7b-hf  # <-- a folder or an id of the hub
  # revision: null  # the hub's commit, for a run that can be repeated

sources:  # they are what it learns from; `rayfuse inspect` tells how well tokenizers align
  - name: openllama  # <-- any name; it is part of a folder's
    model: openlm-research/open_llama_7b_v2
    gpus: 1  # of one actor; parts are allowed
    max_actors: 8
    # accelerator_type: null  # the kind of GPU as Ray names it, such as L4
  - name: mpt  # <--
    model: mosaicml/mpt-7b
    gpus: 1
    max_actors: 8

capture:  # every source scores the text once, and what it says is kept
  # top_k: 16
  batch_tokens: 16384  # of one forward pass; raise it until the GPU's memory is used

# fusion: default  # `paper` is as FuseLLM was

# align:
  # method: bytes  # or exact, min_edit_distance, cooccurrence

# fuse:
  # method: min_ce  # or avg_ce
  # unit: row  # or document, span, token

train:
  num_workers: 8
  gpus_per_worker: 1  # said, or a cluster that has no GPU yet would train on CPUs
  # min_workers: null  # goes on with so few while spot machines are away
  # lambda: {start: 0.5, end: 0.9}  # weight of the text itself, from the first step to the last
  learning_rate: 1.0e-5
  # epochs: 1
  # rows_per_step: 128
  # zero_stage: 2
  gradient_checkpointing: true  # activations are computed twice, and take a tenth of the memory
  # checkpoint_every_steps: 500

# evaluate:
  # held_out_share: 0.02
"""
