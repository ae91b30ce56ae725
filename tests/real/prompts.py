"""Prompts for the real pair: code, prose, lists, arithmetic, other scripts; and two that ask for a copy."""

PROMPTS = (
    "Write a Python function that reverses the words of a sentence.",
    "Write a SQL query that lists the three customers with the highest total order value.",
    "Explain recursion to a ten-year-old in three sentences.",
    "What is 17 * 23? Show the steps.",
    "Write a haiku about autumn rain.",
    "List five common causes of memory leaks in C++.",
    "Translate into French: Where is the nearest train station?",
    "Write a regular expression that matches an ISO date such as 2024-05-17 and explain it.",
    "Summarise the plot of Romeo and Juliet in two sentences.",
    "Write a bash one-liner that counts the lines of all .py files below the current folder.",
    "用一句话解释什么是机器学习。",
    "What does HTTP status 429 mean, and how should a client react?",
    "Write a JavaScript function debounce(fn, delay_ms).",
    "Name the planets of the solar system in order.",
    "Convert 98.6 degrees Fahrenheit to Celsius.",
    "Write a unit test in pytest for a function add(a, b).",
    "Why do leaves change colour? Answer briefly.",
    "Write a Rust struct for a point in the plane and a method for its distance to another one.",
    "Give me a recipe for pancakes with four ingredients.",
    "Напиши приветствие на русском языке.",
)

COPYING = (
    "Rename the variable total to amount in this function and print it whole:\n"
    "def net(total, rate):\n    tax = total * rate\n    total = total - tax\n    return round(total, 2)",
    "Repeat word for word: The harbour was quiet at dawn, and the nets lay drying along the old stone pier.",
)
"""Their answers say again what stands in them."""
