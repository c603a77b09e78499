"""The feature store: what Feast keeps of a platform's players, offline point in time and online, generated from `fastq.features`."""
