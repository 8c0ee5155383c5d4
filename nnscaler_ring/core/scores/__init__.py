"""What happens to scores inside a tile: softcap, bias, ALiBi, dropout."""
