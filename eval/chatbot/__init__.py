"""Chatbots compared: questions answered, answers judged by models and people, verdicts counted."""
