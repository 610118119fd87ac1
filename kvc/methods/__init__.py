"""The methods: frozen dataclasses whose fields are the hyper-parameters of the papers."""
