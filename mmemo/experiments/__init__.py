"""Many runs: pipelines of stages, and studies of arms by seeds."""
