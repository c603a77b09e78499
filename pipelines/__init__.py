"""The batch entry points: Prefect flows, each reading, one or two calls into `fastq`, writing. They meet serving in storage only."""
