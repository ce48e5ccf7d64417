"""What a TeleChat model is: variants, parameters, official configs, the rotary rule, operations."""
