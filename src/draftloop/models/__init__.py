"""A model's name becomes a checked local folder; its tokenizer, its text, its share of memory."""
