"""Completions drawn by a vLLM server (docs/rollouts-from-vllm.md).

- :mod:`~mmemo.generation.vllm.config`: the section ``rollout.vllm``.
- :mod:`~mmemo.generation.vllm.client`: HTTP requests to one server.
- :mod:`~mmemo.generation.vllm.adapter`: the trained adapter as vLLM reads it, by version.
- :mod:`~mmemo.generation.vllm.prompts`: token ids with the media of a row.
- :mod:`~mmemo.generation.vllm.server`: a server that this process starts.
- :mod:`~mmemo.generation.vllm.engine`: the rollout engine.
"""
