"""The `graco` family: the published SimpleClick network, which clicks enter early, with GraCo's adapters."""
