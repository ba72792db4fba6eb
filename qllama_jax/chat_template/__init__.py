"""Messages -> the prompt of a chat model, by the Jinja template that came with the model."""

from qllama_jax.chat_template.render import ChatTemplateError as ChatTemplateError
from qllama_jax.chat_template.render import render_chat as render_chat
