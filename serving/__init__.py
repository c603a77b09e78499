"""The online entry point: recommendations and explanations over HTTP, every decision logged. Imports `fastq` and `feature_repo`, never training."""
