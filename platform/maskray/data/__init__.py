"""From pictures to batches: sources, shards, the plan of their order, decoding, the stream."""
