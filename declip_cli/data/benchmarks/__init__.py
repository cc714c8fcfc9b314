"""The known data sets and the folders of users, read into `Dataset`s."""
