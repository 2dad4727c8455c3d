"""Deploy time: the reference networks, the sampler, the backends and the pipeline that makes videos with them."""
