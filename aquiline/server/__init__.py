"""An OpenAI-compatible server over AsyncLLM: protocol, routes, tools, metrics."""
