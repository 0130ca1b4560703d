"""Arrays that live on the stages of a step."""
