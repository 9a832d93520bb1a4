"""fastbgad"""
