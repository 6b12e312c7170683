"""A Meteor with a real Llama: SmolLM2-135M-Instruct behind the toy's four encoders."""
