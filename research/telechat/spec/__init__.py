"""What a TeleChat model is: variants, parameters, rotary rule, operations."""
