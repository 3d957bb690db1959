"""The networks of a distillation: teacher, student, fake score, discriminator, moving average."""
