/// The version of everything in this package.
public let quireVersion = "0.1"
