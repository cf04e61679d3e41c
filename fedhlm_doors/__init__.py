"""APIs that programs already speak, over HTTP: OpenAI's and Ollama's. It needs the extra `serve`."""
