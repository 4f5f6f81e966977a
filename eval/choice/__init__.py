"""Multiple choice by likelihood: the answer that a model finds most probable."""
