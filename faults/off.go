//go:build !faults

package faults

import "time"

// At does nothing.
func At(string) {}

// Err returns nil.
func Err(string) error { return nil }

// Now is the time.
func Now() time.Time { return time.Now() }
