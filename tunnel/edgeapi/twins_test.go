package edgeapi

import (
	"encoding/json"
	"testing"
)

// TestTwinHash: order, times, versions, blanks and the escapes that JSON's
// encoder adds on the way do not count; values, qualities and names do.
func TestTwinHash(t *testing.T) {
	base := []TwinValue{
		{Property: "temp", Value: json.RawMessage(`{"a": "<1>"}`), Quality: "good", TS: 1, Version: "x"},
		{Property: "relay", Value: json.RawMessage(`true`), Quality: "good"},
	}
	want, err := TwinHash(base)
	if err != nil {
		t.Fatal(err)
	}
	var sent TwinFrame
	b, err := json.Marshal(TwinFrame{Values: []TwinValue{base[1], base[0]}})
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &sent); err != nil {
		t.Fatal(err)
	}
	sent.Values[1].TS, sent.Values[1].Version, sent.Values[0].Received = 5, "y", 7
	if got, err := TwinHash(sent.Values); err != nil || got != want {
		t.Errorf("after being sent: %q, %v; want %q", got, err, want)
	}
	for what, change := range map[string]func(*TwinValue){
		"value":   func(v *TwinValue) { v.Value = json.RawMessage(`{"a": "<2>"}`) },
		"quality": func(v *TwinValue) { v.Quality = "stale" },
		"name":    func(v *TwinValue) { v.Property = "temp2" },
	} {
		other := []TwinValue{base[0], base[1]}
		change(&other[0])
		if got, err := TwinHash(other); err != nil || got == want {
			t.Errorf("another %s: %q, %v; want another hash", what, got, err)
		}
	}
	if _, err := TwinHash([]TwinValue{{Property: "x", Value: json.RawMessage(`{`)}}); err == nil {
		t.Error("a broken value has a hash")
	}
}
